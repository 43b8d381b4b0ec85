/**
 * Layouts of the draft that early hardware was built to (the request for comments of January 2025 on the virtio list and the
 * slides about it). Bytes, without implicit padding. It has `esn` but no lifetime, and options 0 to 4 only.
 */
import type { WireLayout } from './codec.ts';
import { SaOption } from './numbers.ts';

export const rfc202501Layout: WireLayout = {
  revision: 'rfc-2025-01',
  options: SaOption.esn | SaOption.udpEncap | SaOption.copyDscp | SaOption.decrementTtl | SaOption.copyDf,
  modeCapability: {
    size: 40,
    mode: 0, // u8, reserved[3]
    maxReplayWindow: 4, // le32
    options: 8, // le32
    ciphers: 12, // le64
    macs: 20, // le64
    aeads: 28, // le32
    maxCipherKeyLength: 32, // le32
    maxAuthKeyLength: 36, // le32
  },
  sa: {
    size: 166,
    mode: 0, // u8
    direction: 1, // u8, reserved[2]
    objectId: 4, // le32
    spi: 8, // le32
    salt: 12, // le32 holding four bytes in order
    options: 16, // le64
    tunnelType: 24, // u8, reserved[3]
    tunnel: 28, // union, without the trailing reserved bytes of the standard
    tunnelSize: 38,
    esn: 66, // le64
    udpSourcePort: 74, // le16
    udpDestinationPort: 76, // le16
    replayWindow: 78, // le32
    cipherAlgorithm: 82, // le64
    cipherKey: { length: 90, data: 92 }, // le16, data[32]
    authAlgorithm: 124, // le64
    authKey: { length: 132, data: 134 }, // le16, data[32]
  },
};
