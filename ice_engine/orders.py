"""In which order our own hooks of one event fire: a handler's own is 0."""

BEFORE = -101  # before the optimizers' own
OPTIMIZERS = -100  # validation and checkpoints on the same event see the step already taken
PEERS = -99  # then all ranks do what they do together
FIRST = -98  # before everybody else's
LAST = 10**6  # after everybody else's
