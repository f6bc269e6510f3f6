"""What is a change, how does it go on, and how does it come off without a trace?"""
