"""What people start: the command line and the chat. Built on the public names of `edgelm` alone."""
