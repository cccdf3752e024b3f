"""Who is who in a cluster: keys, certificates, the master's register, and how a device joins.

Does no network input or output. The only package that makes certificates.
"""
