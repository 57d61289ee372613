"""The loops over key tiles, one file per mechanism. Named after what moves and multiplies, not after a GPU."""
