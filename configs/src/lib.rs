//! Every shipped configuration, handed to tests as text.
