//! Generates the Rust code of both interfaces from their protos, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for proto in ["runtime/v1/api.proto", "stasis/v1/stasis.proto"] {
        println!("cargo:rerun-if-changed=proto/{proto}");
        let descriptors = protox::compile([proto], ["proto"])?;
        tonic_prost_build::configure().compile_fds(descriptors)?;
    }
    Ok(())
}
