/**
 * SAs as plain data for people, logs and JSON: never a key, a salt or an IV. Numbers of 64 bits are decimal strings, as in SA files.
 */
import { formatIp, formatPrefix } from '../packet/addresses.ts';
import type { SaHandle, SaTraffic } from './ipsec.ts';
import type { Aead, Auth, Cipher, SecurityAssociation, Selector, UdpEncap } from './sa.ts';

type Data = string | number | boolean | null | readonly Data[] | { readonly [name: string]: Data };

/** Plain data: what `JSON.stringify` writes as it is. */
export type Description = { readonly [name: string]: Data };

/** An SA as it was asked for. Algorithms have names and key lengths in bits. */
export function describeSa(sa: SecurityAssociation): Description {
  const { name, tunnel, udpEncap, lifetime, initial } = sa;
  return {
    ...(name === undefined ? {} : { name }),
    direction: sa.direction,
    protocol: sa.protocol,
    mode: sa.mode,
    spi: spiText(sa.spi),
    ...(sa.aead && { aead: algorithm(sa.aead) }),
    ...(sa.cipher && { cipher: algorithm(sa.cipher) }),
    ...(sa.auth && { auth: algorithm(sa.auth) }),
    ...(tunnel && {
      tunnel: { ...tunnel, source: formatIp(tunnel.source), destination: formatIp(tunnel.destination) },
    }),
    ...(udpEncap && { udpEncap: encapsulationData(udpEncap) }),
    options: { ...sa.options },
    replayWindow: sa.replayWindow,
    lifetime: {
      softPackets: String(lifetime.softPackets),
      hardPackets: String(lifetime.hardPackets),
      softBytes: String(lifetime.softBytes),
      hardBytes: String(lifetime.hardBytes),
    },
    tfcPadding: sa.tfcPadding,
    initialSequence: String(initial.sequence),
    selector: selectorData(sa.selector),
  };
}

/** An SA that exists: where it runs and what it has carried. */
export function describeHandle(sa: SaHandle): Description {
  const { handle, name, direction, protocol, mode, placement } = sa;
  return {
    handle,
    ...(name === undefined ? {} : { name }),
    direction,
    protocol,
    mode,
    spi: spiText(sa.spi),
    placement: { ...placement },
    traffic: trafficData(sa.traffic()),
  };
}

function trafficData({ packets, bytes, dropped, softExpired, sequence, engine }: SaTraffic): Description {
  return {
    packets: String(packets),
    bytes: String(bytes),
    dropped: { ...dropped },
    softExpired,
    ...(sequence === undefined ? {} : { sequence: String(sequence) }),
    ...(engine === undefined ? {} : { engine }),
  };
}

function encapsulationData({ originalSource, originalDestination, ...ports }: UdpEncap): Description {
  return {
    ...ports,
    ...(originalSource && { originalSource: formatIp(originalSource) }),
    ...(originalDestination && { originalDestination: formatIp(originalDestination) }),
  };
}

function algorithm(part: Aead | Cipher | Auth): Description {
  const icv = 'icvLength' in part ? { icvLength: part.icvLength } : {};
  return { name: part.name, keyBits: 8 * part.key.length, ...icv };
}

function selectorData(selector: Selector): Description {
  const { source, destination, protocol, sourcePort, destinationPort } = selector;
  return {
    ...(source && { source: formatPrefix(source) }),
    ...(destination && { destination: formatPrefix(destination) }),
    ...(protocol === undefined ? {} : { protocol }),
    ...(sourcePort === undefined ? {} : { sourcePort }),
    ...(destinationPort === undefined ? {} : { destinationPort }),
  };
}

function spiText(spi: number): string {
  return `0x${spi.toString(16).padStart(8, '0')}`;
}
