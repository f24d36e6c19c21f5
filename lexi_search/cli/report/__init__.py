"""The one-page report of `lexi-search auto`, as Markdown and as a page that needs no other file and no network.

Read `statements` (its sentences), `facts` (its figures), `drawings` (heatmap and front as SVG) and `pages` (both
forms).
"""
