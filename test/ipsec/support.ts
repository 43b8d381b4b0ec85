/** Associations for tests: complete, valid, and easy to vary. Keys are test patterns. */
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import '../equality.ts';

export function key(length: number, first = 1): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (first + i) & 0xff);
}

const base: SecurityAssociation = {
  direction: 'outbound',
  protocol: 'esp',
  mode: 'tunnel',
  spi: 0x1000,
  options: { esn: false, copyDscp: false, copyDf: false, decrementTtl: false, ecn: false },
  replayWindow: 0,
  lifetime: { softPackets: 0n, hardPackets: 0n, softBytes: 0n, hardBytes: 0n },
  tfcPadding: 0,
  initial: { sequence: 1n },
  selector: {},
};

const tunnel = {
  source: Uint8Array.of(192, 0, 2, 1),
  destination: Uint8Array.of(192, 0, 2, 2),
  ttl: 64,
  dscp: 0,
  df: false,
  flowLabel: 0,
};

/** An outbound ESP tunnel with AES-128-GCM; `change` replaces fields. */
export function outbound(change: Partial<SecurityAssociation> = {}): SecurityAssociation {
  const aead = { name: 'aes-gcm', key: key(16), salt: key(4, 0x50), icvLength: 16 } as const;
  const algorithms = change.cipher === undefined && change.auth === undefined ? { aead } : {};
  return { ...base, ...((change.mode ?? 'tunnel') === 'tunnel' ? { tunnel } : {}), ...algorithms, ...change };
}

/** The inbound counterpart of `outbound`. */
export function inbound(change: Partial<SecurityAssociation> = {}): SecurityAssociation {
  return outbound({ direction: 'inbound', replayWindow: 64, initial: { sequence: 0n }, ...change });
}
