//! The checkpoint archive and checkpoint image: writing, reading three dialects, inspection.
