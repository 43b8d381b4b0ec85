import { interopScenario } from '../bodies/interop.ts';

export const scenario = interopScenario({ parts: ['integrity', 'options'], where: 'inline' });
