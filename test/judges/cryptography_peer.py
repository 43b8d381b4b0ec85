"""An IPsec peer that is not ours: the packets of the RFCs, by hand, over the arithmetic of Python's `cryptography`.

Reads one JSON request a line, answers one JSON line each:
  {"sa": {...as in an SA file, addresses as text, keys as hex...}, "packet": HEX of a protected IP packet, "sequence": its
   64-bit number as text}
  -> {"inner": HEX of the packet inside, "sealed": HEX of the same packet protected anew, with the next number}
  or {"error": TEXT}
Runs with Debian's python3-cryptography. No options or extension headers in front of ESP and AH.
"""
import hmac
import json
import os
import struct
import sys

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.cmac import CMAC

ESP, AH, UDP, IPV4, IPV6 = 50, 51, 17, 4, 41
HASHES = {"hmac-sha1": "sha1", "hmac-sha256": "sha256", "hmac-sha384": "sha384", "hmac-sha512": "sha512"}


def aes_block(key, block):
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return encryptor.update(block) + encryptor.finalize()


def xor(a, b):
    return bytes(x ^ y for x, y in zip(a, b))


def xcbc(key, data):
    """RFC 3566, 4."""
    k1, k2, k3 = (aes_block(key, bytes([n]) * 16) for n in (1, 2, 3))
    blocks = [data[i : i + 16] for i in range(0, len(data), 16)] or [b""]
    state = bytes(16)
    for block in blocks[:-1]:
        state = aes_block(k1, xor(state, block))
    last = blocks[-1]
    last = xor(last, k2) if len(last) == 16 else xor((last + b"\x80").ljust(16, b"\0"), k3)
    return aes_block(k1, xor(state, last))


def mac(auth, data):
    key = bytes.fromhex(auth["key"])
    if auth["name"] == "aes-xcbc":
        tag = xcbc(key, data)
    elif auth["name"] == "aes-cmac":
        cmac = CMAC(algorithms.AES(key))
        cmac.update(data)
        tag = cmac.finalize()
    else:
        tag = hmac.new(key, data, HASHES[auth["name"]]).digest()
    return tag[: auth["icvLength"]]


def gcm(key, nonce, aad, text, tag=None, length=16):
    """Opens with a tag, seals without one."""
    if tag is not None:
        decryptor = Cipher(algorithms.AES(key), modes.GCM(nonce, tag, min_tag_length=len(tag))).decryptor()
        decryptor.authenticate_additional_data(aad)
        return decryptor.update(text) + decryptor.finalize()
    encryptor = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(aad)
    return encryptor.update(text) + encryptor.finalize() + encryptor.tag[:length]


def check(found, computed):
    if not hmac.compare_digest(found, computed):
        raise InvalidTag()


def crypt(cipher, iv, text, opening):
    name = cipher["name"]
    if name == "null":
        return text
    key = bytes.fromhex(cipher["key"])
    if name == "aes-ctr":
        mode = Cipher(algorithms.AES(key), modes.CTR(bytes.fromhex(cipher["salt"]) + iv + b"\0\0\0\1"))
    else:
        mode = Cipher(algorithms.TripleDES(key) if name == "3des-cbc" else algorithms.AES(key), modes.CBC(iv))
    context = mode.decryptor() if opening else mode.encryptor()
    return context.update(text) + context.finalize()


IV_LENGTH = {"null": 0, "aes-cbc": 16, "3des-cbc": 8, "aes-ctr": 8}


def header(spi, sequence):
    return struct.pack(">II", spi, sequence & 0xFFFFFFFF)


def high(sa, sequence):
    return struct.pack(">I", sequence >> 32) if sa["options"].get("esn") else b""


def open_esp(sa, spi, sequence, body):
    """Plain text with its trailer, and the IV."""
    first, esn = header(spi, sequence), high(sa, sequence)
    if "cipher" in sa:
        length, icv = IV_LENGTH[sa["cipher"]["name"]], sa["auth"]["icvLength"]
        check(body[-icv:], mac(sa["auth"], first + body[:-icv] + esn))
        iv = body[:length]
        return crypt(sa["cipher"], iv, body[length:-icv], True), iv
    aead = sa["aead"]
    key, salt, icv = bytes.fromhex(aead["key"]), bytes.fromhex(aead["salt"]), aead["icvLength"]
    iv, text, tag = body[:8], body[8:-icv], body[-icv:]
    aad = first[:4] + esn + first[4:]
    if aead["name"] == "aes-gmac":
        gcm(key, salt + iv, aad + iv + text, b"", tag)
        return text, iv
    if aead["name"] == "aes-gcm":
        return gcm(key, salt + iv, aad, text, tag), iv
    if aead["name"] == "aes-ccm":
        return AESCCM(key, tag_length=icv).decrypt(salt + iv, text + tag, aad), iv
    return ChaCha20Poly1305(key).decrypt(salt + iv, text + tag, aad), iv


def seal_esp(sa, spi, sequence, plain, iv):
    first, esn = header(spi, sequence), high(sa, sequence)
    if "cipher" in sa:
        sealed = iv + crypt(sa["cipher"], iv, plain, False)
        return sealed + mac(sa["auth"], first + sealed + esn)
    aead = sa["aead"]
    key, salt, icv = bytes.fromhex(aead["key"]), bytes.fromhex(aead["salt"]), aead["icvLength"]
    aad = first[:4] + esn + first[4:]
    if aead["name"] == "aes-gmac":
        return iv + plain + gcm(key, salt + iv, aad + iv + plain, b"", None, icv)
    if aead["name"] == "aes-gcm":
        return iv + gcm(key, salt + iv, aad, plain, None, icv)
    if aead["name"] == "aes-ccm":
        return iv + AESCCM(key, tag_length=icv).encrypt(salt + iv, plain, aad)
    return iv + ChaCha20Poly1305(key).encrypt(salt + iv, plain, aad)


def next_iv(iv, sa):
    if "cipher" in sa and sa["cipher"]["name"] in ("aes-cbc", "3des-cbc"):
        return os.urandom(len(iv))
    return (int.from_bytes(iv, "big") + 1).to_bytes(len(iv), "big") if iv else iv


def internet_checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def outer_of(packet):
    """IP header and the protocol behind it."""
    return (packet[:20], packet[9]) if packet[0] >> 4 == 4 else (packet[:40], packet[6])


def rewritten(ip, protocol, payload):
    """The IP header in front of another payload."""
    ip = bytearray(ip)
    if ip[0] >> 4 == 6:
        ip[4:6], ip[6] = struct.pack(">H", len(payload)), protocol
    else:
        ip[2:4], ip[9], ip[10:12] = struct.pack(">H", 20 + len(payload)), protocol, b"\0\0"
        ip[10:12] = struct.pack(">H", internet_checksum(bytes(ip)))
    return bytes(ip) + payload


def unpad(plain, alignment):
    length, protocol = plain[-2], plain[-1]
    if plain[-2 - length : -2] != bytes(range(1, length + 1)) or length >= alignment:
        raise ValueError(f"padding of {length}")
    return plain[: -2 - length], protocol


def answer_esp(sa, packet, sequence):
    ip, protocol = outer_of(packet)
    rest = packet[len(ip) :]
    udp = rest[:8] if protocol == UDP else b""
    rest = rest[len(udp) :]
    spi, low = struct.unpack(">II", rest[:8])
    if spi != int(sa["spi"], 0) or low != sequence & 0xFFFFFFFF:
        raise ValueError(f"SPI {spi}, number {low}")
    plain, iv = open_esp(sa, spi, sequence, rest[8:])
    alignment = {"aes-cbc": 16, "3des-cbc": 8}.get(sa.get("cipher", {}).get("name"), 4)
    payload, inner = unpad(plain, alignment)
    sealed = header(spi, sequence + 1) + seal_esp(sa, spi, sequence + 1, plain, next_iv(iv, sa))
    if udp and ip[0] >> 4 == 6:
        # The checksum covers what has changed (RFC 8200, 8.1).
        pseudo = ip[8:40] + struct.pack(">IxxxB", len(udp + sealed), UDP)
        data = udp[:6] + b"\0\0" + sealed
        total = internet_checksum(pseudo + data + b"\0" * (len(data) % 2)) or 0xFFFF
        udp = udp[:6] + struct.pack(">H", total)
    if sa["mode"] == "transport":
        payload = rewritten(ip, inner, payload)
    elif inner != (IPV4 if payload[0] >> 4 == 4 else IPV6):
        raise ValueError(f"next header {inner}")
    return payload, ip + udp + sealed


def authenticated(ip):
    """RFC 4302, 3.3.3.1: the header with what changes on the way set to zero."""
    ip = bytearray(ip)
    if ip[0] >> 4 == 4:
        ip[1], ip[6:8], ip[8], ip[10:12] = 0, b"\0\0", 0, b"\0\0"
    else:
        ip[0:4], ip[7] = b"\x60\0\0\0", 0
    return bytes(ip)


def ah_icv(sa, ip, ah, payload, sequence):
    """`ah` with a zero ICV; for GMAC with its IV."""
    data = authenticated(ip) + ah + payload + high(sa, sequence)
    auth = sa["auth"]
    if auth["name"] != "aes-gmac":
        return mac(auth, data)
    return gcm(bytes.fromhex(auth["key"]), bytes.fromhex(auth["salt"]) + ah[12:20], data, b"")


def answer_ah(sa, packet, sequence):
    ip, protocol = outer_of(packet)
    rest = packet[len(ip) :]
    size = (rest[1] + 2) * 4
    ah, payload = rest[:size], rest[size:]
    spi, low = struct.unpack(">II", ah[4:12])
    if protocol != AH or spi != int(sa["spi"], 0) or low != sequence & 0xFFFFFFFF:
        raise ValueError(f"protocol {protocol}, SPI {spi}, number {low}")
    iv = 8 if sa["auth"]["name"] == "aes-gmac" else 0
    at, icv = 12 + iv, sa["auth"]["icvLength"]
    blank = ah[:at] + bytes(icv) + ah[at + icv :]
    check(ah[at : at + icv], ah_icv(sa, ip, blank, payload, sequence))
    blank = blank[:4] + header(spi, sequence + 1) + next_iv(ah[12:at], sa) + blank[at:]
    tag = ah_icv(sa, ip, blank, payload, sequence + 1)
    sealed = ip + blank[:at] + tag + blank[at + icv :] + payload
    inner = rewritten(ip, ah[0], payload) if sa["mode"] == "transport" else payload
    return inner, sealed


for line in sys.stdin:
    request = json.loads(line)
    try:
        answer = answer_ah if request["sa"]["protocol"] == "ah" else answer_esp
        inner, sealed = answer(request["sa"], bytes.fromhex(request["packet"]), int(request["sequence"]))
        reply = {"inner": inner.hex(), "sealed": sealed.hex()}
    except Exception as error:  # the judge's verdict is data for the test
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), flush=True)
