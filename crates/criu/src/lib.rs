//! What is asked of CRIU (configuration, features) and what it says (log diagnosis, statistics).
