"""The quickstart in colour: pictures of open emoji sets with the names that Unicode gives them.

Start reading at `course`, what it teaches; `pictures` are the sets that ship, `rasterize` made them.
"""
