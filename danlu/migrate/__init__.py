"""Files that other tools train from, translated into recipes; every line is accounted for."""
