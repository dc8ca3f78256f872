//! Images: references, manifests, unpacked layers, import, export, push, and their garbage collection.
