"""The families of decoders, each a table: how its configs are read, and where its checkpoints have each part."""
