//! Control groups of version 2, version 1 and hybrid hosts behind one small interface.
