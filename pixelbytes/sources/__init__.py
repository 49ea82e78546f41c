"""What `pixelbytes build` reads, and the common path that writes data folders and packed sets."""
