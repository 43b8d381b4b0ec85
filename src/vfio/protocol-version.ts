/** vfio-user: the VERSION message, which opens a session. `protocol.ts` is the entry. */
import { readU16, writeU16 } from '../sys/little-endian.ts';
import { atLeast, type Capabilities, DEFAULT_CAPABILITIES, protocolError, Version } from './protocol-layout.ts';

export interface VersionMessage {
  readonly major: number;
  readonly minor: number;
  readonly capabilities: Capabilities;
}

/** The payload of a VERSION request or reply. */
export function encodeVersion(version: VersionMessage): Uint8Array {
  const { capabilities } = version;
  const json = JSON.stringify({
    capabilities: {
      max_msg_fds: capabilities.maxMessageDescriptors,
      max_data_xfer_size: capabilities.maxDataTransfer,
      max_dma_maps: capabilities.maxDmaMaps,
      pgsizes: capabilities.pageSizes,
    },
  });
  const data = new TextEncoder().encode(`${json}\0`);
  const payload = new Uint8Array(Version.fixed + data.length);
  writeU16(payload, Version.major, version.major);
  writeU16(payload, Version.minor, version.minor);
  payload.set(data, Version.data);
  return payload;
}

/**
 * Capabilities that are missing take their defaults; unknown ones are ignored; those of a wrong type are `PROTOCOL`.
 */
export function decodeVersion(payload: Uint8Array): VersionMessage {
  atLeast('VERSION', payload, Version.fixed);
  return {
    major: readU16(payload, Version.major),
    minor: readU16(payload, Version.minor),
    capabilities: decodeCapabilities(payload.subarray(Version.data)),
  };
}

function decodeCapabilities(data: Uint8Array): Capabilities {
  if (data.length === 0) return DEFAULT_CAPABILITIES;
  if (data.indexOf(0) !== data.length - 1) throw protocolError('VERSION data does not end with its only NUL');
  let json: unknown;
  try {
    json = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(data.subarray(0, data.length - 1)));
  } catch (cause) {
    throw protocolError('VERSION data is not JSON', cause);
  }
  if (!isObject(json)) throw protocolError('VERSION data is not a JSON object');
  const { capabilities: given = {} } = json;
  if (!isObject(given)) throw protocolError('capabilities is not a JSON object');
  const number = (name: string, least: number, fallback: number): number => {
    const value = given[name];
    if (value === undefined) return fallback;
    if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < least) {
      throw protocolError(`capability ${name} is not an integer of at least ${least}`);
    }
    return value;
  };
  return {
    maxMessageDescriptors: number('max_msg_fds', 0, DEFAULT_CAPABILITIES.maxMessageDescriptors),
    maxDataTransfer: number('max_data_xfer_size', 8, DEFAULT_CAPABILITIES.maxDataTransfer),
    maxDmaMaps: number('max_dma_maps', 0, DEFAULT_CAPABILITIES.maxDmaMaps),
    pageSizes: number('pgsizes', 1, DEFAULT_CAPABILITIES.pageSizes),
  };
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
