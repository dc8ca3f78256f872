//! Container Network Interface: configuration lists, plugin execution and cached results.
