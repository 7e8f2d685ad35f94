"""The commands: parse the arguments, call the engine, print."""
