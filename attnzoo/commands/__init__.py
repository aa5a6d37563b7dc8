"""Groups of commands of `attnzoo.cli`, a door like it: thin, and free to import every room when called."""
