"""`edgelm pi`: the Raspberry Pi, from what the board is to a demo that fills its screen."""
