"""From files to rows: read, clean, deduplicate, tokenise, store as shards, stream.  No torch here."""
