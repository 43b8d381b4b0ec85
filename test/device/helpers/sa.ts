/** SA objects for tests. */
import type { IpsecWire, SaObject } from '../../../src/ipsec/wire/codec.ts';
import { IpsecMode, SaDirection } from '../../../src/ipsec/wire/numbers.ts';

const AES_GCM = 1n;

/** An AES-128-GCM tunnel, with what a test wants different. */
export function saObject(change: Partial<SaObject> = {}): SaObject {
  return {
    mode: IpsecMode.espTunnel,
    direction: SaDirection.outbound,
    objectId: 0,
    spi: 0x1001,
    salt: Uint8Array.of(1, 2, 3, 4),
    options: 0n,
    tunnel: {
      source: Uint8Array.of(192, 0, 2, 1),
      destination: Uint8Array.of(192, 0, 2, 2),
      dscp: 0,
      df: false,
      ttl: 64,
      flowLabel: 0,
    },
    udpSourcePort: 0,
    udpDestinationPort: 0,
    replayWindow: 0,
    cipherAlgorithm: AES_GCM,
    cipherKey: new Uint8Array(16).fill(7),
    authAlgorithm: 0n,
    authKey: new Uint8Array(0),
    softPackets: 0n,
    softBytes: 0n,
    hardPackets: 0n,
    hardBytes: 0n,
    esn: 0n,
    ...change,
  };
}

/** The inbound side of the same: without a tunnel header, as the standard allows. */
export function inboundObject(change: Partial<SaObject> = {}): SaObject {
  return saObject({ direction: SaDirection.inbound, tunnel: null, replayWindow: 64, ...change });
}

export function encodeSa(wire: IpsecWire, object: SaObject): Uint8Array {
  const out = new Uint8Array(wire.saObjectSize);
  wire.encodeSa(object, out);
  return out;
}
