/**
 * What kind of function the device shows: `standard` as Virtio 1.4 describes it, `octep` as hardware of that class does.
 */
import { Feature, FeatureSet } from '../../virtio/features.ts';
import type { RegisterWindow, WindowHost } from '../function.ts';
import type { PciLayout } from '../pci.ts';
import { OCTEP_QUEUE_SIZE, octepFeatures, octepLayout, octepQueueCount, octepWindowSize } from './octep.ts';
import type { OctepFault } from './octep-faults.ts';
import { FirmwareWindow } from './octep-window.ts';
import { offeredFeatures, type PersonalityOptions, pciLayout, QueueSize, requiredFeatures } from './standard.ts';

export const PERSONALITIES = ['standard', 'octep'] as const;
export type PersonalityName = (typeof PERSONALITIES)[number];

export interface Personality {
  readonly layout: PciLayout;
  readonly offered: FeatureSet;
  /** What a driver must accept, or FEATURES_OK is not set. */
  readonly required: FeatureSet;
  /** Largest size of queue `index`; `offered` as it really is, faults included. */
  maxQueueSize(index: number, offered: FeatureSet): number;
  /** Registers other than those of the standard. */
  readonly window?: (host: WindowHost) => RegisterWindow;
}

export function personalityOf(
  name: PersonalityName,
  options: PersonalityOptions,
  octepFaults: ReadonlySet<OctepFault> = new Set(),
): Personality {
  return name === 'octep' ? octep(options, octepFaults) : standard(options);
}

function standard(options: PersonalityOptions): Personality {
  const data = 2 * options.queuePairs;
  return {
    layout: pciLayout(options),
    offered: offeredFeatures(options),
    required: requiredFeatures(options),
    maxQueueSize: (index, offered) => {
      if (index < data) return QueueSize.net;
      return offered.has(Feature.CTRL_VQ) && index === data ? QueueSize.control : QueueSize.admin;
    },
  };
}

/** Words of features that the firmware has: those of before Virtio 1.4, or all of them. */
const FEATURE_WORDS = { published: 2, withIpsec: 4 } as const;

function octep(options: PersonalityOptions, faults: ReadonlySet<OctepFault>): Personality {
  const { queuePairs, ipsec } = options;
  return {
    layout: octepLayout(options, faults),
    offered: octepFeatures(options, faults),
    // Its firmware takes anything, and then does not work.
    required: FeatureSet.empty,
    maxQueueSize: () => OCTEP_QUEUE_SIZE,
    window: (host) =>
      new FirmwareWindow(host, {
        size: octepWindowSize(options),
        dataQueues: 2 * queuePairs,
        queues: octepQueueCount(options),
        featureWords: ipsec ? FEATURE_WORDS.withIpsec : FEATURE_WORDS.published,
        faults,
      }),
  };
}
