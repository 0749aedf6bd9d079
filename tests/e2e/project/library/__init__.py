"""A sample application that went through six releases, one migration each: `RELEASE` says which it is."""
