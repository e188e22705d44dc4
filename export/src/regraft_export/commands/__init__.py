"""The subcommands of the export distribution, one module each; see :mod:`regraft.commands`."""
