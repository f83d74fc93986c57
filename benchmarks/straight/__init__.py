"""The same jobs written the plain way, for comparison only.

Pillow images transformed one by one in two loader workers, float32 in NCHW, one forward pass for every kind of input,
and everything computed anew in every step: the style in which the code of such papers is usually written.
"""
