//! Tasks and processes behind one interface, whatever shim runs them.
