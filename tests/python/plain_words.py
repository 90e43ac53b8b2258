"""Words that neither documents nor code use, and what to write instead; see the style guide."""

# A word of the house -> the word of the field.
BANNED = {
    r"fore(?:tells?|told|telling)": "predict",
    r"tells?|told|telling": "report",
    r"letters?": "completion",
    r"withdraws?|withdrawn|withdrew|withdrawing|withdrawal": "cancel",
    r"lanes?": "copy engine, stream",
    r"landed|lands|landing": "arrived",
    r"fading": "moving average",
    r"of late": "recent",
    r"on (?:its|their|the) way": "in flight",
    r"under way": "in flight, current",
    r"backlog": "unread tokens",
    r"anew": "again",
    r"blazing|seamless(?:ly)?|powerful": "a figure",
}
# A sentence has a noun as its subject.
OPENERS = ("What", "That which", "Those that", "Who")

# Code uses these for copies and streams; documents use them for other things too.
BANNED_IN_CODE = BANNED | {
    r"fades?": "decay",
    r"marks?": "event",
    r"pieces?": "chunk",
}
