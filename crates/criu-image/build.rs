//! Generates two things from CRIU's protos, without protoc: the messages as Rust types, and the same as tables, which
//! the strict check and the JSON output walk.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use protox::prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let mut files: Vec<PathBuf> = fs::read_dir("proto")?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "proto"));
    files.sort();
    let mut compiler = protox::Compiler::new(["proto"])?;
    for file in &files {
        compiler.open_file(file)?;
    }
    let mut messages = prost_build::Config::new();
    messages.disable_comments(["."]);
    messages.compile_fds(compiler.file_descriptor_set())?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo names no OUT_DIR")?);
    fs::write(out.join("schema.rs"), schema(&compiler.descriptor_pool())?)?;
    check_one_package(&out)
}

/// prost names the file after the package, and CRIU's protos have none.
fn check_one_package(out: &Path) -> Result<()> {
    if out.join("_.rs").exists() { Ok(()) } else { Err("the protos have a package".into()) }
}

fn schema(pool: &DescriptorPool) -> Result<String> {
    let mut text = String::new();
    let mut enums = BTreeSet::new();
    for message in
        pool.all_messages().filter(|message| message.parent_file().name() != "google/protobuf/descriptor.proto")
    {
        write!(
            text,
            "pub(crate) static {}: Message = Message {{ name: {:?}, fields: &[",
            constant(message.full_name()),
            message.name()
        )?;
        let mut fields: Vec<_> = message.fields().collect();
        fields.sort_by_key(FieldDescriptor::number);
        for field in fields {
            if let Kind::Enum(kind) = field.kind() {
                enums.insert(kind.full_name().to_owned());
            }
            writeln!(text, "{},", self::field(&field)?)?;
        }
        writeln!(text, "] }};")?;
    }
    for kind in pool.all_enums().filter(|kind: &EnumDescriptor| enums.contains(kind.full_name())) {
        let values: Vec<_> = kind.values().map(|value| (value.number(), value.name().to_owned())).collect();
        writeln!(text, "static {}: &[(i32, &str)] = &{values:?};", constant(kind.full_name()))?;
    }
    Ok(text)
}

fn field(field: &FieldDescriptor) -> Result<String> {
    let kind = match field.kind() {
        Kind::Uint32 => "Kind::Uint32".to_owned(),
        Kind::Uint64 => "Kind::Uint64".to_owned(),
        Kind::Int32 => "Kind::Int32".to_owned(),
        Kind::Int64 => "Kind::Int64".to_owned(),
        Kind::Sint32 => "Kind::Sint32".to_owned(),
        Kind::Sint64 => "Kind::Sint64".to_owned(),
        Kind::Fixed64 => "Kind::Fixed64".to_owned(),
        Kind::Bool => "Kind::Bool".to_owned(),
        Kind::String => "Kind::Text".to_owned(),
        Kind::Bytes => "Kind::Bytes".to_owned(),
        Kind::Enum(kind) => format!("Kind::Enum({})", constant(kind.full_name())),
        Kind::Message(message) => format!("Kind::Message(&{})", constant(MessageDescriptor::full_name(&message))),
        other => {
            return Err(
                format!("{} has the type {other:?}, which no field of CRIU had before", field.full_name()).into()
            );
        }
    };
    if field.is_packed() {
        return Err(format!("{} is packed, which no field of CRIU was before", field.full_name()).into());
    }
    let label = match field.cardinality() {
        Cardinality::Required => "Required",
        Cardinality::Optional => "Optional",
        Cardinality::Repeated => "Repeated",
    };
    Ok(format!(
        "Field {{ number: {}, name: {:?}, kind: {kind}, label: Label::{label}, shown: {} }}",
        field.number(),
        field.name(),
        shown(field)?
    ))
}

/// How crit shows the field to people: the option `criu` of CRIU's protos.
fn shown(field: &FieldDescriptor) -> Result<String> {
    let extension = field.parent_file().parent_pool().get_extension_by_name("criu").ok_or("opts.proto has no criu")?;
    let options = field.options();
    let value = options.get_extension(&extension);
    let options: &DynamicMessage = value.as_message().ok_or("the option criu is no message")?;
    let flag = |name: &str| options.get_field_by_name(name).and_then(|value| value.as_bool()).unwrap_or_default();
    let text = |name: &str| {
        let value = options.get_field_by_name(name);
        value.and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    };
    Ok(match (text("flags"), text("dict"), text("conv")) {
        _ if flag("hex") => "Shown::Hex".to_owned(),
        _ if flag("ipadd") => "Shown::Address".to_owned(),
        _ if flag("odev") => "Shown::OldDevice".to_owned(),
        _ if flag("dev") => "Shown::Device".to_owned(),
        (flags, _, _) if !flags.is_empty() => format!("Shown::Flags({flags:?})"),
        (_, dict, _) if !dict.is_empty() => format!("Shown::Word({dict:?})"),
        (_, _, conv) if !conv.is_empty() => "Shown::UnixName".to_owned(),
        _ => "Shown::Plain".to_owned(),
    })
}

/// `inventory_entry` becomes `INVENTORY_ENTRY`, `core_entry.march` becomes `CORE_ENTRY_MARCH`.
fn constant(name: &str) -> String {
    name.replace('.', "_").to_uppercase()
}
