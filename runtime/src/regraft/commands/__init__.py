"""The subcommands of the runtime, one module each.

A command module has a docstring (its help), ``add_arguments(parser)`` and ``run(args) -> int`` (the
exit code). It raises :class:`regraft.errors.RegraftError` for what the user can mend.
"""
