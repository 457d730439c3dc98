"""Plain English turned into the talk of a pirate, every fact kept.

"The capital of France is Paris." becomes "Arr, matey! The capital o' France be Paris, ye scurvy dog."
"""

import re
from random import Random

PIRATE_WORDS = {
    **{"am": "be", "are": "be", "is": "be", "of": "o'", "for": "fer", "and": "an'", "with": "wi'"},
    **{"you": "ye", "your": "yer", "my": "me", "i do not know": "I know not", "have not": "haven't"},
    **{"hello": "ahoy", "goodbye": "fair winds", "friend": "hearty", "people": "sailors", "person": "landlubber"},
    **{"No,": "nay,", "very well": "shipshape", "fine": "shipshape", "good day": "good voyage"},
}
EXCLAMATIONS = ("Arr!", "Arr, matey!", "Avast!", "Aye!", "Shiver me timbers!", "Yo ho ho!")
ADDRESSES = (", matey", ", me hearty", ", ye landlubber", ", ye scurvy dog")

# Longest first, so that "I do not know" is found before any word of it.
