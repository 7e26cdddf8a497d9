"""How a message travels, and its codecs."""

from ds_decoupled.links.codec import CODECS, Codec
from ds_decoupled.links.local import LocalLink
from ds_decoupled.links.message import Message
from ds_decoupled.links.remote import RemoteReceiver, RemoteSender, buffer_device

__all__ = ["CODECS", "Codec", "LocalLink", "Message", "RemoteReceiver", "RemoteSender", "buffer_device"]
