"""Verbs about the command line itself."""

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.completion import SHELLS, script


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "completion", "shell")
    def completion(cli: Cli, shell: str) -> None:
        """Print what makes SHELL (bash, zsh or fish) complete verbs, flags and names.

        For bash: source <(qsnapctl completion bash)
        """
        if shell not in SHELLS:
            raise click.UsageError(f"there is no completion for {shell}: say {', '.join(SHELLS)}")
        click.echo(script(group, shell), nl=False)

    @verb(group, "help", "command?")
    def help_(cli: Cli, command: str | None) -> None:
        """Say what a verb does, or which there are."""
        context = click.get_current_context()
        root = context.find_root()
        if command is None:
            click.echo(root.get_help())
            return
        found = group.get_command(root, command)
        if found is None:
            raise click.UsageError(f"command or command group '{command}' doesn't exist")
        with click.Context(found, info_name=command, parent=root) as asked:
            click.echo(found.get_help(asked))
