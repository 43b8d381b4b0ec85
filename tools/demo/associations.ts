/**
 * The security associations of the demo: a tunnel in each direction for each family, with fresh random keys.
 */
import { randomBytes } from 'node:crypto';
import { type SecurityAssociation, type SecurityAssociationInput, validateSa } from '../../src/index.ts';
import { Network } from './traffic.ts';
import type { Side } from './wire.ts';

/** One tunnel in one direction: what the sender and what the receiver is given. */
export interface Tunnel {
  readonly name: string;
  readonly from: Side;
  readonly spi: number;
  readonly outbound: SecurityAssociationInput;
  readonly inbound: SecurityAssociationInput;
}

const Families = [
  { name: 'IPv4', ends: ['192.0.2.1', '192.0.2.2'], network: Network.ipv4, keyLength: 16, spi: 0x1000 },
  { name: 'IPv6', ends: ['2001:db8::1', '2001:db8::2'], network: Network.ipv6, keyLength: 32, spi: 0x6000 },
] as const;

/** The four tunnels; AES-128-GCM over IPv4, AES-256-GCM over IPv6. */
export function makeTunnels(): Tunnel[] {
  return Families.flatMap(({ name, ends, network, keyLength, spi }) =>
    ([0, 1] as const).map((from): Tunnel => {
      const to = from === 0 ? 1 : 0;
      const common = {
        name: `${name} ${from === 0 ? 'east to west' : 'west to east'}`,
        mode: 'tunnel',
        spi: spi + from + 1,
        aead: { name: 'aes-gcm', key: randomBytes(keyLength), salt: randomBytes(4) },
        tunnel: { source: ends[from], destination: ends[to] },
        selector: { source: network, destination: network },
      } as const;
      return {
        name: common.name,
        from,
        spi: common.spi,
        outbound: { ...common, direction: 'outbound' },
        inbound: { ...common, direction: 'inbound', replayWindow: 1024 },
      };
    }),
  );
}

/** The outbound SAs as the decryption file wants them. */
export function validated(tunnels: readonly Tunnel[]): SecurityAssociation[] {
  return tunnels.map(({ outbound }) => validateSa(outbound));
}

/** Overwrites the keys. */
export function wipeTunnels(tunnels: readonly Tunnel[]): void {
  for (const { outbound } of tunnels) {
    for (const secret of [outbound.aead?.key, outbound.aead?.salt]) if (secret instanceof Uint8Array) secret.fill(0);
  }
}
