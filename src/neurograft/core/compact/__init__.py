"""How do the chosen numbers of frozen parameters train, and nothing else?"""
