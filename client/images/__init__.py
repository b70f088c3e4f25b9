"""Reading a hospital's images: layouts, decoding, safety checks and the cache."""
