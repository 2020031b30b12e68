"""Data that crosses the wire: events, commands, plan, subjects, manifest, errors. No I/O."""
