"""In which order our own hooks of one event fire: a handler's own is 0."""

BEFORE = -102  # where a resumed run begins is known first
MEETING = -101  # then all ranks tell each other what schedules count on
OPTIMIZERS = -100  # validation and checkpoints on the same event see the step already taken
PEERS = -99  # then all ranks do what they do together
FIRST = -98  # before everybody else's
LAST = 10**6  # after everybody else's
