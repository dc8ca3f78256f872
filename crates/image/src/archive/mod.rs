//! Images as archives: import of OCI layouts and `docker save` files, export of an archive that both kinds of reader take.

mod export;
mod import;
mod members;
