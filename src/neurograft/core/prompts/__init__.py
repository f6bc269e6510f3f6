"""Where in a text does something stand, and what is answered there?"""
