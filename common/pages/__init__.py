"""HTML pages of one file each: escaped text, one look, nothing loaded from anywhere."""
