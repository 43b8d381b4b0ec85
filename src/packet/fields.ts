/**
 * Where the fields of link, network and transport headers are, and the numbers that appear in them.
 *
 * Offsets are bytes from the start of the header they belong to. All multi-byte fields are big-endian.
 * Only what the package reads or writes is listed; nothing here parses.
 */

/** Ethernet II (IEEE 802.3, 3.2.6): two addresses and the type. */
export const Ethernet = { destination: 0, source: 6, type: 12, length: 14 } as const;

/** EtherTypes (IANA "IEEE 802 Numbers"). */
export const EtherType = { ipv4: 0x0800, arp: 0x0806, vlan: 0x8100, serviceVlan: 0x88a8, ipv6: 0x86dd } as const;

/** 802.1Q tag: stands where the EtherType was, which moves behind it (IEEE 802.1Q, 9.6). */
export const Vlan = { tci: 2, length: 4 } as const;

/** IPv4 (RFC 791, 3.1). */
export const Ipv4 = {
  /** Upper nibble: 4. Lower nibble: header length in 32-bit words. */
  versionIhl: 0,
  /** DSCP in the upper six bits (RFC 2474), ECN in the lower two (RFC 3168). */
  tos: 1,
  totalLength: 2,
  identification: 4,
  /** Flags in the upper three bits, fragment offset in units of 8 bytes in the others. */
  flagsFragment: 6,
  ttl: 8,
  protocol: 9,
  checksum: 10,
  source: 12,
  destination: 16,
  /** Without options. */
  minLength: 20,
  maxLength: 60,
} as const;

/** Bits of `Ipv4.flagsFragment` (RFC 791, 3.1; RFC 6864). */
export const Ipv4Fragment = { dontFragment: 0x4000, moreFragments: 0x2000, offsetMask: 0x1fff } as const;

/** IPv6 (RFC 8200, 3). */
export const Ipv6 = {
  /** Version (4 bits), traffic class (8), flow label (20). */
  versionClassFlow: 0,
  /** Bytes after this header. */
  payloadLength: 4,
  nextHeader: 6,
  hopLimit: 7,
  source: 8,
  destination: 24,
  length: 40,
} as const;

/** The head of a hop-by-hop, routing or destination options header (RFC 8200, 4.3, 4.4, 4.6). */
export const Ipv6Extension = {
  nextHeader: 0,
  /** In units of 8 bytes, the first 8 not counted. */
  lengthUnits: 1,
  unit: 8,
} as const;

/** IPv6 fragment header (RFC 8200, 4.5). */
export const Ipv6Fragment = {
  nextHeader: 0,
  /** Offset in units of 8 bytes in the upper 13 bits; bit 0: more fragments. */
  offsetMore: 2,
  identification: 4,
  length: 8,
  offsetMask: 0xfff8,
  moreFragments: 0x0001,
} as const;

/** Protocol numbers and next-header values (IANA "Assigned Internet Protocol Numbers"). */
export const IpProtocol = {
  hopByHop: 0,
  icmp: 1,
  ipv4: 4,
  tcp: 6,
  udp: 17,
  dccp: 33,
  ipv6: 41,
  routing: 43,
  fragment: 44,
  esp: 50,
  ah: 51,
  icmpv6: 58,
  /** No next header (RFC 8200, 4.7); in ESP a dummy packet (RFC 4303, 2.6). */
  none: 59,
  destinationOptions: 60,
  sctp: 132,
  mobility: 135,
  udpLite: 136,
} as const;

/** UDP (RFC 768). */
export const Udp = { sourcePort: 0, destinationPort: 2, udpLength: 4, checksum: 6, length: 8 } as const;

/** TCP (RFC 9293, 3.1). */
export const Tcp = {
  sourcePort: 0,
  destinationPort: 2,
  sequence: 4,
  acknowledgement: 8,
  /** Upper nibble: header length in 32-bit words. */
  dataOffset: 12,
  flags: 13,
  checksum: 16,
  minLength: 20,
} as const;

/** The ports of UDP, TCP, SCTP, DCCP and UDP-Lite stand in the same four bytes. */
export const Ports = { source: 0, destination: 2, length: 4 } as const;

/** ICMP and ICMPv6 (RFC 792; RFC 4443, 2.1). */
export const Icmp = { type: 0, code: 1, checksum: 2, identifier: 4, sequence: 6, length: 8 } as const;

/** ESP (RFC 4303, 2). The trailer stands before the ICV: padding, pad length, next header. */
export const Esp = { spi: 0, sequence: 4, length: 8, trailerLength: 2 } as const;

/** AH (RFC 4302, 2). */
export const Ah = {
  nextHeader: 0,
  /** Header length in 32-bit words minus 2. */
  payloadLength: 1,
  reserved: 2,
  spi: 4,
  sequence: 8,
  /** The ICV starts here. */
  length: 12,
} as const;

/** UDP encapsulation of ESP (RFC 3948). */
export const UdpEsp = {
  /** The port of NAT traversal (2.1). */
  port: 4500,
  /** Four zero bytes where the SPI would be: an IKE message (2.2). */
  nonEspMarkerLength: 4,
  /** A one-byte payload of this value is a NAT keep-alive (2.3). */
  keepAlive: 0xff,
} as const;

/** Link types of capture files (https://www.tcpdump.org/linktypes.html). */
export const LinkType = { ethernet: 1, raw: 101, ipv4: 228, ipv6: 229 } as const;
