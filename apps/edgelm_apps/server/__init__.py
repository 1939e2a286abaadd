"""`edgelm serve`: the API that OpenAI's clients speak, for the models of this machine, inside one memory budget."""
