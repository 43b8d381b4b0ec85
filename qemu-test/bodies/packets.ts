/** IPv4 and UDP in Ethernet frames, as the bodies send them and the wire looks at them. Frames come from a NIC: any bytes will do. */

export const ETHERNET = 14;
const IPV4 = 20;
const UDP = 8;
/** Bytes of headers in front of a datagram. */
export const UDP_PAYLOAD = ETHERNET + IPV4 + UDP;
const Protocol = { udp: 17, esp: 50, ah: 51 } as const;
const At = {
  etherType: 12,
  protocol: ETHERNET + 9,
  source: ETHERNET + 12,
  destination: ETHERNET + 16,
  ports: ETHERNET + IPV4,
} as const;

export interface Datagram {
  readonly from: { readonly mac: Uint8Array; readonly address: readonly number[]; readonly port: number };
  readonly to: { readonly mac: Uint8Array; readonly address: readonly number[]; readonly port: number };
  readonly payload: Uint8Array;
}

/** An Ethernet frame with IPv4 and UDP, both checksums filled. */
export function udpFrame({ from, to, payload }: Datagram): Buffer {
  const frame = Buffer.alloc(UDP_PAYLOAD + payload.length);
  frame.set(to.mac);
  frame.set(from.mac, 6);
  frame.writeUInt16BE(0x0800, At.etherType);
  const ip = frame.subarray(ETHERNET);
  ip.set([0x45, 0, 0, 0, 0, 0, 0, 0, 64, Protocol.udp, 0, 0, ...from.address, ...to.address]);
  ip.writeUInt16BE(ip.length, 2);
  ip.writeUInt16BE(checksum(ip.subarray(0, IPV4), 0), 10);
  const udp = ip.subarray(IPV4);
  udp.writeUInt16BE(from.port, 0);
  udp.writeUInt16BE(to.port, 2);
  udp.writeUInt16BE(udp.length, 4);
  udp.set(payload, UDP);
  udp.writeUInt16BE(udpChecksum(ip) || 0xffff, 6);
  return frame;
}

/** Leaves the UDP checksum of a frame of `udpFrame` to the device: the field holds the sum of the pseudo header (Virtio 1.4, 5.1.9.2). */
export function leaveChecksum(frame: Buffer): { readonly start: number; readonly offset: number } {
  const ip = frame.subarray(ETHERNET);
  frame.writeUInt16BE(~checksum(Buffer.alloc(0), pseudoHeader(ip)) & 0xffff, UDP_PAYLOAD - UDP + 6);
  return { start: UDP_PAYLOAD - UDP, offset: 6 };
}

/** Whether the UDP checksum of a frame of `udpFrame` is right (RFC 768). */
export function hasRightChecksum(frame: Uint8Array): boolean {
  const ip = Buffer.from(frame.buffer, frame.byteOffset + ETHERNET, frame.length - ETHERNET);
  return checksum(ip.subarray(0, IPV4), 0) === 0 && udpChecksum(ip) === 0;
}

export const isIpv4 = (frame: Uint8Array): boolean =>
  frame.length >= ETHERNET + IPV4 && frame[At.etherType] === 0x08 && frame[At.etherType + 1] === 0;

export const isUdp = (frame: Uint8Array): boolean =>
  isIpv4(frame) && frame.length >= UDP_PAYLOAD && frame[At.protocol] === Protocol.udp;

export const isIpsec = (frame: Uint8Array): boolean =>
  isIpv4(frame) && (frame[At.protocol] === Protocol.esp || frame[At.protocol] === Protocol.ah);

/** Makes the answer of a UDP echo server out of a datagram: senders and receivers change places, which changes no checksum. */
export function turnRound(frame: Uint8Array): void {
  if (!isUdp(frame)) return;
  swap(frame, 0, 6, 6);
  swap(frame, At.source, At.destination, 4);
  swap(frame, At.ports, At.ports + 2, 2);
}

function swap(bytes: Uint8Array, a: number, b: number, length: number): void {
  // A copy: `slice` of a Buffer would not be one.
  const kept = Uint8Array.from(bytes.subarray(a, a + length));
  bytes.copyWithin(a, b, b + length);
  bytes.set(kept, b);
}

/** Over the pseudo header, header and data; 0 when the field holds the right one. */
function udpChecksum(ip: Buffer): number {
  return checksum(ip.subarray(IPV4, ip.readUInt16BE(2)), pseudoHeader(ip));
}

function pseudoHeader(ip: Buffer): number {
  let sum = Protocol.udp + ip.readUInt16BE(2) - IPV4;
  for (let at = 12; at < IPV4; at += 2) sum += ip.readUInt16BE(at);
  return sum;
}

/** RFC 1071. */
function checksum(bytes: Buffer, from: number): number {
  let sum = from;
  // Guests are slow: not by `readUInt16BE`, which checks each time.
  for (let at = 0; at + 1 < bytes.length; at += 2) sum += (bytes[at] << 8) | bytes[at + 1];
  if (bytes.length % 2 === 1) sum += bytes[bytes.length - 1] << 8;
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}
