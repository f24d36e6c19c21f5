"""What is said of a family, as data; the families themselves are in `moe_families` and `decoder_families`.

Read `default_parts`, `defaults` and `config` (what a config may leave out), `refused` (what is no family here), then
`moe`, `kinds` and `decoder`.
"""
