"""What an engine is: its bindings and profiles, the bundle that holds it and the compilers that make it."""
