"""Trust with TUF and DSSE, whose every signature, key and check is `tuf`'s and `securesystemslib`'s. Extra: `trust`.

keys       private keys as PEM files
client     what one client trusts, on disk: metadata verified and accepted as a whole or not at all
asking     who answers a client's questions
attacks    which attack a refusal of the library means
plans      a plan in its signed envelope
folder     the offline half of a repository as files
ceremony   making it, rotation, revocation, signing by one keyholder after the other
overview   what such a folder says
http       the library's own client over plain HTTP, for the command line
bus        metadata over the bus, for a gateway
"""
