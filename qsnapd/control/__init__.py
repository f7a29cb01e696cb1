"""The control socket: Varlink on a unix socket, its server and its client.

`client` imports neither trio nor pydantic, so that a command line starts quickly; nothing
here imports it but the command line.
"""
