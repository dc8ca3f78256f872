//! Linux namespaces: pinned, entered, compared.
