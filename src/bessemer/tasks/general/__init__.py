"""Everyday requests with a written judge of help and harm, and the preference pairs made from them."""
